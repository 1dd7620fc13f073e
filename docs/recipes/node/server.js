const http = require("http");

const server = http.createServer((request, response) => response.end("hello from node"));
server.listen(3000, "0.0.0.0");
process.on("SIGTERM", () => server.close(() => process.exit(0)));
