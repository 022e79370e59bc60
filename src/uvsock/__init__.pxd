# What compiled user code may cimport.
from uvsock._framing cimport Cut, Envelope, Framer
from uvsock._handlers cimport Handlers
from uvsock._sink cimport BufferSink
from uvsock._socket cimport Socket
