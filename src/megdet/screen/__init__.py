"""What a training looks like in a terminal: beside the training, and from another terminal by its files alone."""
