"""Checks of the data sets of detection and segmentation."""
