"""Networks that segmentation-models-pytorch does not have."""
