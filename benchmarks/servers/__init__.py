"""The servers of the peers. Each does the same work, written the way its own documentation would.

``python -m benchmarks.servers.X BEHAVIOUR ...`` listens on a free port of 127.0.0.1, prints the
port, and serves until its standard input ends. A line on standard input asks for a garbage
collection; the answer is one line of JSON: the number of objects the collector tracks, and how long
it took.

==============  ====================================================================================
``echo``        sends back what arrives
``small_writes``  answers each event with five writes of one byte
``fan_out``     sends what arrives to all connections
``send``        a request is the number of bytes wanted (8 bytes, little endian), and gets as many
``receive``     a request is the number of bytes that follow; answered with one byte at their end
==============  ====================================================================================
"""
