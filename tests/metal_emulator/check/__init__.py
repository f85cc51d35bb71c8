"""The parser behind static_check.py, and the declarations of Metal that it reads."""
