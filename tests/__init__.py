"""Tests of what users rely on. Nothing here may reach for a network: what needs one brings its own server."""

import os

# Before anything imports the libraries, which read these once.
os.environ.update({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
