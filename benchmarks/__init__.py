"""What measures the library; not part of the installed package."""
