"""What is passed around: values, checked on construction. No I/O."""
