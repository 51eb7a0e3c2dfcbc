"""Less memory and time for a loaded denoiser: fewer bits, offloading, compilation, attention."""
