"""Models on a disk that processes and pods share: found or downloaded whole, verified, and never served torn."""
