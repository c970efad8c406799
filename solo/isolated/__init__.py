"""What runs in img2dataset's own environment: the standard library, and OpenCV in one process that may crash."""
