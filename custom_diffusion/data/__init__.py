"""What a run trains on: concepts, captions, images, and what is computed of them ahead."""
