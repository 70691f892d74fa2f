"""What every engine on an NVIDIA GPU shares: libcuda, the device, its memory and graphs."""
