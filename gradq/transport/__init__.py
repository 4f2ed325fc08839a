"""How messages reach other ranks: channels, the threads or streams that use them, and the handshake."""
