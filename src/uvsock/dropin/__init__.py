"""What runs asyncio's own programs on uvsock: the loop, its transports and the streams."""
