"""The families of synthetic tasks, by what their images show."""
