// The conversation through a pipe: what the model gets to read, the commands, Ctrl-C, and what is refused.
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { chatTemplate, decodingStrategies, generate, loadModel } from "@switchyard/models";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { printable } from "./chat.ts";
import { main } from "./main.ts";
import { runCommand } from "./run.test-util.ts";
import { saveChatModel, template } from "./serve/serve.test-util.ts";
import { fixture, saveSmallModel } from "./small-model.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-chat-"));
afterAll(() => rmSync(root, { recursive: true }));
const small = join(root, "small");
beforeAll(() => saveChatModel(small));

/** Runs the command on lines; `stopAt` presses Ctrl-C `times` when output matches. */
async function run(lines: readonly string[], args: readonly string[] = [], stopAt?: RegExp, times = 1, dir = small) {
  const input = new PassThrough();
  let [out, error, pressed] = ["", "", false];
  const stop = (text: string): void => {
    if (pressed || !stopAt?.test(text)) return;
    pressed = true;
    for (let i = 0; i < times; i++) process.emit("SIGINT");
  };
  const streams = {
    out(text: string) {
      out += text;
      stop(text);
    },
    error(text: string) {
      error += text;
      stop(text);
    },
  };
  input.end(lines.map((line) => `${line}\n`).join(""));
  const code = await main(["chat", dir, "--backend", "cpu", "--max-new", "5", ...args], { streams, input });
  expect(process.listenerCount("SIGINT")).toBe(0);
  return { code, out, error };
}

/** What the function gives for these messages. */
async function expected(messages: { role: string; content: string }[], options: object = {}): Promise<string> {
  const { model, tokenizer, close } = await loadModel(small, { engine: engine(cpu()) });
  if (!tokenizer) throw new Error("no tokenizer");
  const prompt = tokenizer.encode(chatTemplate({ jinja: template }).render(messages, { addGenerationPrompt: true }));
  let text = "";
  const how = { strategy: decodingStrategies.greedy(), ...options };
  for await (const token of generate(model, { prompt, tokenizer, maxNew: 5, ...how })) text += token.text;
  await close();
  return text;
}
const user = (content: string) => ({ role: "user", content });
const assistant = (content: string) => ({ role: "assistant", content });

test("every answer knows what was said before", async () => {
  const first = await expected([user("A whale")]);
  const second = await expected([user("A whale"), assistant(first), user("Yale")]);
  const { code, out, error } = await run(["A whale", "", "Yale"]);
  expect({ code, out, error }).toEqual({ code: 0, out: `${first}\n${second}\n`, error: "" });
});

test("/reset, /system and messages over several lines", async () => {
  const system = (content: string) => ({ role: "system", content });
  const answers = [
    await expected([system("Be brief."), user("A whale")]),
    await expected([system("Be brief."), user("My\nYale")]),
    await expected([system("Sing."), user("/me")]),
    await expected([user("A\n ship")]),
  ];
  const lines = [
    "A whale",
    "/reset",
    "My\\",
    "Yale",
    "/system Sing.",
    "/reset",
    "//me",
    "/system",
    "/reset",
    "A\\",
    " ship\\",
  ];
  const { code, out, error } = await run(lines, ["--system", "Be brief."]);
  expect([code, out]).toEqual([0, answers.map((answer) => `${answer}\n`).join("")]);
  expect(error).toBe("Forgotten.\nSystem message set.\nForgotten.\nNo system message.\nForgotten.\n");
});

test("/save writes a new file and no other", async () => {
  const file = join(root, "talk.json");
  const { code, error } = await run(
    ["A whale", `/save ${file}`, `/save ${file}`, "/save", "/exit", "Yale"],
    ["--system", "S"],
  );
  const { schema, messages } = JSON.parse(readFileSync(file, "utf8"));
  expect(schema).toBe("switchyard/conversation/1");
  expect(messages.map(({ role }: { role: string }) => role)).toEqual(["system", "user", "assistant"]);
  expect(error).toMatch(/^2 messages saved in .*talk\.json\ncannot save .*EEXIST.*\n\/save takes the name of a file/);
  expect(code).toBe(1);
});

test("samples with a seed that counts up, by the options of a strategy", async () => {
  const first = await expected([user("A whale")], { strategy: decodingStrategies.sample({ temperature: 2 }), seed: 7 });
  const second = await expected([user("A whale")], {
    strategy: decodingStrategies.sample({ temperature: 2 }),
    seed: 8,
  });
  const { out } = await run(["A whale", "/reset", "A whale"], ["--temperature", "2", "--seed", "7"]);
  expect(out).toBe(`${first}\n${second}\n`);
});

test("--json prints each answer as a line", async () => {
  const { out } = await run(["A whale", "Yale"], ["--json"]);
  const lines = out
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(lines).toHaveLength(2);
  const [first] = lines;
  expect(first).toMatchObject({ schema: "switchyard/chat/1", tokens: 5, ending: "maxNew" });
  expect(first.content).toBe(await expected([user("A whale")]));
});

describe("Ctrl-C", () => {
  test("stops an answer, and the conversation goes on", async () => {
    const { code, out, error } = await run(["A whale", "/reset", "A whale"], [], /\S/);
    const whole = await expected([user("A whale")]);
    const [stopped = "", ...rest] = out.split("\n");
    expect(code).toBe(0);
    expect(stopped.length).toBeLessThan(whole.length);
    expect(whole.startsWith(stopped)).toBe(true);
    expect(rest.join("\n")).toBe(`${whole}\n`);
    expect(error).toBe("(stopped)\nForgotten.\n");
  });
  test("twice leaves", async () => {
    const { code, out } = await run(["A whale", "Yale", "My"], [], /\S/, 2);
    expect(code).toBe(130);
    expect(out.split("\n").length).toBe(2);
  });
  test("without an answer it asks once more", async () => {
    const input = new PassThrough();
    let error = "";
    const ended = main(["chat", small, "--backend", "cpu"], {
      input,
      streams: {
        out: () => undefined,
        error(text) {
          error += text;
          // The command is done with the line by then.
          if (/Forgotten|leaves/.test(text)) setImmediate(() => process.emit("SIGINT"));
        },
      },
    });
    input.write("/reset\n");
    expect(await ended).toBe(130);
    expect(error).toBe("Forgotten.\n\nCtrl-C again leaves; so does /exit.\n");
  });
});

test("a terminal gets text and nothing that steers it", () => {
  expect(printable("a\tb\nc é ☺\u{1F40B}")).toBe("a\tb\nc é ☺\u{1F40B}");
  expect(printable("\u001B[2J\r\u0007\u009B1m")).toBe("\uFFFD[2J\uFFFD\uFFFD\uFFFD1m");
});

test("a message that does not fit is taken back", async () => {
  const { code, out, error } = await run(["whale ".repeat(90), "A whale"]);
  expect(error).toMatch(/^the conversation has \d+ tokens, the model's context is 64: \/reset forgets it\n$/);
  expect([code, out]).toEqual([1, `${await expected([user("A whale")])}\n`]);
});

test("refuses checkpoints that cannot chat, and says what they can", async () => {
  const plain = join(root, "plain");
  await saveSmallModel(plain);
  const none = await run(["x"], [], undefined, 1, plain);
  expect([none.code, none.out]).toEqual([1, ""]);
  expect(none.error).toMatch(/plain has no chat template: .*switchyard generate .*plain --prompt TEXT\n$/);
  const ids = await run(["x"], [], undefined, 1, fixture("mixtral"));
  expect(ids.error).toMatch(/chat needs a tokenizer: .*--ids 1,2,3/);
  expect((await run(["/nothing"])).error).toMatch(/^unknown command \/nothing; there are \/reset/);
  expect(existsSync(join(root, "talk.json"))).toBe(true);
});

test("explains itself", async () => {
  const { code, out } = await runCommand(["chat", "--help"]);
  expect(code).toBe(0);
  for (const part of ["--system", "--strategy", "/reset", "/save FILE", "Ctrl-C", "EXAMPLE"])
    expect(out).toContain(part);
});
