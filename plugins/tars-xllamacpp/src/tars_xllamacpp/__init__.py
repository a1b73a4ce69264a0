"""TARS backend: llama.cpp's own server engine, from prebuilt wheels."""
