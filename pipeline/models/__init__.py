"""The frozen networks: encoders and autoencoders by loader, their weights, and what a picture is to each."""
