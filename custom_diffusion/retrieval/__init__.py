"""Class images from elsewhere: sources, downloads, checks, and the folder of a class."""
