// Starts the real binary on a free port, with a golden checkpoint, for the tests of the Node SDK.
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("../../../", import.meta.url));

/** `bitnet serve` with ARGS: its address, and how to end it. */
export async function start(...args) {
  const binary = process.env.BITNET_BIN ?? `${root}target/release/bitnet`;
  const model = `${root}tests/golden/public/p1_packed`;
  const child = spawn(binary, ["serve", "--port", "0", "-m", model, ...args], { stdio: ["ignore", "pipe", "ignore"] });
  const url = await new Promise((resolve, reject) => {
    createInterface(child.stdout).on("line", (line) => line.startsWith("listening on ") && resolve(line.split(" ").at(-1)));
    child.once("error", reject);
    child.once("exit", () => reject(new Error("the server ended before it listened")));
  });
  return { url, stop: () => child.kill("SIGKILL") };
}
