// PyTorch's CPU training step, where a Python with torch is on the PATH: a child process that does one step per line it is sent.
import { execFile, spawn } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import {
  adamwOptions,
  type Contender,
  type LanguageModelCase,
  languageModelData,
  normEps,
} from "@switchyard/bench/kernels";
import type { PeerSource } from "./peer.ts";

const name = "PyTorch";

/** The first Python that imports torch, with torch's version. */
async function findPython(): Promise<{ readonly command: string; readonly version: string }> {
  const tried: string[] = [];
  for (const command of [process.env.PYTHON ?? "python3", "python"]) {
    try {
      const { stdout } = await promisify(execFile)(command, ["-c", "import torch; print(torch.__version__)"]);
      return { command, version: stdout.trim() };
    } catch (error) {
      const reason = String((error as { stderr?: string }).stderr || (error as Error).message).trim();
      tried.push(`${command}: ${reason.split("\n").at(-1)}`);
    }
  }
  throw new Error(`no Python with torch on the PATH (${tried.join("; ")})`);
}

/** All arrays in one file, 4 bytes per number, and where each begins. */
async function writeData(
  folder: string,
  one: LanguageModelCase,
): Promise<{ readonly data: string; readonly header: string }> {
  const { params, ids, labels, cos, sin } = languageModelData(one);
  const half = one.width / one.heads / 2;
  const arrays = {
    ...params,
    ids: { shape: [ids.length], data: ids },
    labels: { shape: [labels.length], data: labels },
    cos: { shape: [one.sequence, half], data: cos },
    sin: { shape: [one.sequence, half], data: sin },
  };
  let offset = 0;
  const entries = Object.entries(arrays).map(([key, { shape, data }]) => {
    const entry = [key, { shape, offset }] as const;
    offset += data.byteLength;
    return entry;
  });
  const bytes = Buffer.concat(
    Object.values(arrays).map(({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength)),
  );
  const files = { data: join(folder, "data.bin"), header: join(folder, "header.json") };
  await writeFile(files.data, bytes);
  const header = { case: one, adamw: adamwOptions, normEps, arrays: Object.fromEntries(entries) };
  await writeFile(files.header, JSON.stringify(header));
  return files;
}

export const torch: PeerSource = {
  name,
  packages: {},
  async open({ threads }) {
    const { command, version } = await findPython();
    return {
      name,
      version,
      threads,
      async training(one): Promise<Contender> {
        const folder = await mkdtemp(join(tmpdir(), "switchyard-torch-"));
        const { data, header } = await writeData(folder, one);
        const script = fileURLToPath(new URL("./training_step.py", import.meta.url));
        const child = spawn(command, [script, data, header, String(threads)], { stdio: ["pipe", "pipe", "inherit"] });
        const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
        const close = async (): Promise<void> => {
          child.stdin.end();
          await rm(folder, { recursive: true, force: true });
        };
        const answer = async (): Promise<unknown> => {
          const { value, done } = await lines.next();
          if (!done) return JSON.parse(value);
          await close();
          throw new Error(`${command} ended early, its last words stand above`);
        };
        const ask = (line: string): Promise<unknown> => {
          child.stdin.write(`${line}\n`);
          return answer();
        };
        await answer(); // ready
        return {
          name,
          outside: true,
          run: () => ask("run"),
          output: async () => (await ask("losses 3")) as number[],
          dispose: close,
        };
      },
    };
  },
};
