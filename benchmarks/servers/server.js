// Node: BEHAVIOUR [FILE], where FILE holds the key and the certificate of a TLS server.
"use strict";
const fs = require("node:fs");
const net = require("node:net");
const tls = require("node:tls");

const [behaviour, file] = process.argv.slice(2);
const CHUNK = Buffer.alloc(65536);
const sockets = new Set();

const wanted = (data) => Number(data.readBigUInt64LE(0));

const behaviours = {
  echo(socket) {
    socket.on("data", (data) => {
      if (!socket.write(data)) socket.pause();
    });
    socket.on("drain", () => socket.resume());
  },
  small_writes(socket) {
    socket.on("data", () => {
      socket.write("a");
      socket.write("b");
      socket.write("c");
      socket.write("d");
      socket.write("e");
    });
  },
  // A socket keeps what its peer does not take.
  fan_out(socket) {
    sockets.add(socket);
    socket.on("data", (data) => {
      for (const each of sockets) each.write(data);
    });
  },
  send(socket) {
    let left = 0;
    const pour = () => {
      let more = true;
      while (left > 0 && more) {
        const size = Math.min(left, CHUNK.length);
        left -= size;
        more = socket.write(size === CHUNK.length ? CHUNK : CHUNK.subarray(0, size));
      }
    };
    socket.on("data", (data) => {
      left = wanted(data);
      pour();
    });
    socket.on("drain", pour);
  },
  receive(socket) {
    let left = 0;
    socket.on("data", (data) => {
      if (left === 0) left = wanted(data) + 8;
      left -= data.length;
      if (left === 0) socket.write(".");
    });
  },
};

function accepted(socket) {
  socket.on("error", () => {});
  socket.on("close", () => sockets.delete(socket));
  behaviours[behaviour](socket);
}

let server;
if (file === undefined) {
  server = net.createServer({ noDelay: true }, accepted);
} else {
  const pem = fs.readFileSync(file);
  server = tls.createServer({ key: pem, cert: pem, noDelay: true }, accepted);
  server.on("tlsClientError", () => {});
}
server.listen({ host: "127.0.0.1", port: 0, backlog: 1024 }, () => {
  console.log(server.address().port);
});
// global.gc is there with --expose-gc.
process.stdin.on("data", () => {
  global.gc();
  console.log("{}");
});
process.stdin.on("end", () => process.exit());
