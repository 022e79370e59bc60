// Bun: BEHAVIOUR [FILE], where FILE holds the key and the certificate of a TLS server.
import type { Socket } from "bun";

const [behaviour, file] = process.argv.slice(2);
const CHUNK = new Uint8Array(65536);

// What a socket did not take, or the number of bytes left (send, receive).
// What has arrived of an unfinished message (lines, length_prefixed).
type Data = { rest: Uint8Array | null; left: number; begun: Buffer };
type Peer = Socket<Data>;
const sockets = new Set<Peer>();

function wanted(data: Uint8Array): number {
  return Number(new DataView(data.buffer, data.byteOffset).getBigUint64(0, true));
}

function pour(socket: Peer) {
  const state = socket.data;
  while (state.left > 0) {
    const size = Math.min(state.left, CHUNK.length);
    const sent = socket.write(CHUNK, 0, size);
    if (sent < 0) return;
    state.left -= sent;
    if (sent < size) return;
  }
}

// Sends a part of an answer, behind what a socket has not taken yet.
function send(socket: Peer, data: Uint8Array) {
  const state = socket.data;
  const sent = state.rest === null ? socket.write(data) : 0;
  if (sent >= 0 && sent < data.length) {
    const more = data.subarray(sent);
    state.rest = state.rest === null ? more : Buffer.concat([state.rest, more]);
  }
}

const LF = 10;

function received(socket: Peer, data: Buffer): Buffer {
  const begun = socket.data.begun;
  return begun.length === 0 ? data : Buffer.concat([begun, data]);
}

// Redis: the strings that are kept, and a request's words, or null while it is unfinished.
const kept = new Map<string, Buffer>();
const OK = Buffer.from("+OK\r\n");
const NIL = Buffer.from("$-1\r\n");
const UNKNOWN = Buffer.from("-ERR unknown command\r\n");

function words(all: Buffer, start: number): { words: Buffer[]; end: number } | null {
  let end = all.indexOf(LF, start);
  if (end < 0) return null;
  let count = Number(all.latin1Slice(start + 1, end - 1));
  const found: Buffer[] = [];
  for (let at = end + 1; count > 0; count--) {
    end = all.indexOf(LF, at);
    if (end < 0) return null;
    const size = Number(all.latin1Slice(at + 1, end - 1));
    at = end + 1 + size + 2;
    if (at > all.length) return null;
    found.push(all.subarray(end + 1, end + 1 + size));
    end = at - 1;
  }
  return { words: found, end: end + 1 };
}

function answer([name, key, value]: Buffer[]): Buffer {
  switch (name?.latin1Slice().toUpperCase()) {
    case "SET":
      kept.set(key.latin1Slice(), Buffer.from(value));
      return OK;
    case "GET": {
      const found = kept.get(key.latin1Slice());
      if (found === undefined) return NIL;
      return Buffer.concat([Buffer.from(`$${found.length}\r\n`), found, Buffer.from("\r\n")]);
    }
    default:
      return UNKNOWN;
  }
}

function writeRest(socket: Peer) {
  const rest = socket.data.rest;
  if (rest === null) return;
  const sent = socket.write(rest);
  socket.data.rest = sent >= 0 && sent < rest.length ? rest.subarray(sent) : null;
}

const behaviours = {
  echo: {
    data(socket: Peer, data: Uint8Array) {
      const sent = socket.write(data);
      if (sent >= 0 && sent < data.length) {
        socket.data.rest = data.subarray(sent);
        socket.pause();
      }
    },
    drain(socket: Peer) {
      if (socket.data.rest === null) return;
      writeRest(socket);
      if (socket.data.rest === null) socket.resume();
    },
  },
  small_writes: {
    data(socket: Peer) {
      socket.write("a");
      socket.write("b");
      socket.write("c");
      socket.write("d");
      socket.write("e");
    },
  },
  fan_out: {
    data(_: Peer, data: Uint8Array) {
      for (const socket of sockets) send(socket, data);
    },
    drain: writeRest,
  },
  send: {
    data(socket: Peer, data: Uint8Array) {
      socket.data.left = wanted(data);
      pour(socket);
    },
    drain: pour,
  },
  receive: {
    data(socket: Peer, data: Uint8Array) {
      const state = socket.data;
      if (state.left === 0) state.left = wanted(data) + 8;
      state.left -= data.length;
      if (state.left === 0) socket.write(".");
    },
  },
  lines: {
    data(socket: Peer, data: Buffer) {
      const all = received(socket, data);
      let start = 0;
      for (let end; (end = all.indexOf(LF, start)) >= 0; start = end + 1)
        send(socket, all.subarray(start, end + 1));
      socket.data.begun = all.subarray(start);
    },
    drain: writeRest,
  },
  length_prefixed: {
    data(socket: Peer, data: Buffer) {
      const all = received(socket, data);
      let start = 0;
      while (all.length - start >= 4) {
        const end = start + 4 + all.readUInt32BE(start);
        if (end > all.length) break;
        send(socket, all.subarray(start, end));
        start = end;
      }
      socket.data.begun = all.subarray(start);
    },
    drain: writeRest,
  },
  redis: {
    data(socket: Peer, data: Buffer) {
      const all = received(socket, data);
      let start = 0;
      for (let request; (request = words(all, start)) !== null; start = request.end)
        send(socket, answer(request.words));
      socket.data.begun = all.subarray(start);
    },
    drain: writeRest,
  },
} as const;

const server = Bun.listen<Data>({
  hostname: "127.0.0.1",
  port: 0,
  tls: file === undefined ? undefined : { key: Bun.file(file), cert: Bun.file(file) },
  socket: {
    open(socket) {
      socket.data = { rest: null, left: 0, begun: Buffer.alloc(0) };
      if (behaviour === "fan_out") sockets.add(socket);
    },
    close(socket) {
      sockets.delete(socket);
    },
    error() {},
    ...behaviours[behaviour as keyof typeof behaviours],
  },
});
console.log(server.port);
process.stdin.on("data", () => {
  Bun.gc(true);
  console.log("{}");
});
process.stdin.on("end", () => process.exit());
