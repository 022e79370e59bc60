// bun echo.js PORT|PATH [CERT KEY]: an echo server on Bun.listen. It prints its port once it listens.
const [where, cert, key] = process.argv.slice(2);
const tls = cert ? { cert: Bun.file(cert), key: Bun.file(key) } : undefined;
const rest = new WeakMap();

function send(socket, data) {
  const sent = socket.write(data);
  if (sent < data.length) {
    rest.set(socket, data.subarray(Math.max(sent, 0)));
    socket.pause();
  } else {
    rest.delete(socket);
  }
}

const server = Bun.listen({
  ...(where.startsWith("/") ? { unix: where } : { hostname: "127.0.0.1", port: Number(where) }),
  tls,
  socket: {
    data(socket, data) {
      // A copy: Bun takes the memory back when this returns.
      const left = rest.get(socket);
      send(socket, left ? Buffer.concat([left, data]) : Buffer.from(data));
    },
    drain(socket) {
      const left = rest.get(socket);
      if (left) send(socket, left);
      if (!rest.has(socket)) socket.resume();
    },
  },
});
console.log(server.port ?? where);
