"""What retrieve.py is made of: sources of candidates, downloads, and the folder of a class."""
