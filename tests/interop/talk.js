// bun talk.js PORT|PATH SIZE [CA]: sends SIZE bytes to an echo server, ends its side when all came
// back, and prints how many did and whether they were the same.
const [where, size, ca] = process.argv.slice(2);
const message = Buffer.alloc(Number(size));
for (let i = 0; i < message.length; i++) message[i] = (i * 31 + (i >> 8)) & 255;
let sent = 0;
let received = 0;
let same = true;

function push(socket) {
  while (sent < message.length) {
    const n = socket.write(message.subarray(sent));
    if (n <= 0) return;
    sent += n;
  }
}

await Bun.connect({
  ...(where.startsWith("/") ? { unix: where } : { hostname: "127.0.0.1", port: Number(where) }),
  tls: ca ? { ca: Bun.file(ca), serverName: "uvsock.test" } : undefined,
  socket: {
    open(socket) {
      if (!ca) push(socket);
    },
    handshake(socket, success, error) {
      if (!success || error) console.log("handshake failed:", error);
      push(socket);
    },
    data(socket, data) {
      same &&= data.equals(message.subarray(received, received + data.length));
      received += data.length;
      if (received >= message.length) socket.end();
    },
    drain: push,
    close() {
      console.log(received, same);
      process.exit(0);
    },
    connectError(socket, error) {
      console.log("no connection:", error.message);
      process.exit(1);
    },
  },
});
