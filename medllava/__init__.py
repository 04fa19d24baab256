"""medllava: narrated histopathology video to a spatially grounded vision-language assistant."""

__version__ = "0.1.0"
