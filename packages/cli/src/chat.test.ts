// The conversation through a pipe: what the model gets to read, the commands, Ctrl-C, and what is refused.
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { chatTemplate, decodingStrategies, generate, loadModel } from "@switchyard/models";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
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

test("what was said is not run again", async () => {
  const { out } = await run(["A whale", "Yale", "/reset", "A whale", "My"], ["--json"]);
  const answers = out
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(answers.map(({ schema }) => schema)).toEqual(Array(4).fill("switchyard/chat/1"));
  const [one, two, again, other] = answers;
  const row = /^\| `chat` \|.*$/m.exec(readFileSync(new URL("../README.md", import.meta.url), "utf8"))?.[0] ?? "";
  for (const key of Object.keys(one).filter((name) => name !== "schema")) expect(row).toContain(`\`${key}\``);
  const messages = [user("A whale"), assistant(one.content), user("Yale")];
  expect([one.content, two.content]).toEqual([await expected(messages.slice(0, 1)), await expected(messages)]);
  // The answer's last token was made and not run; the new message was neither.
  expect(one.reused).toBe(0);
  expect(two.reused).toBeGreaterThanOrEqual(one.prompt - 1);
  expect(two.reused).toBeLessThan(two.prompt - 3);
  expect([again.content, again.reused]).toEqual([one.content, one.prompt - 1]);
  expect(other.reused).toBeGreaterThanOrEqual(one.prompt - 1);
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

describe("in a terminal", () => {
  const saved = Object.getOwnPropertyDescriptor(process.stdout, "isTTY");
  afterEach(() => {
    vi.restoreAllMocks();
    if (saved) Object.defineProperty(process.stdout, "isTTY", saved);
    else Reflect.deleteProperty(process.stdout, "isTTY");
  });
  /** Presses keys; the next ones when the prompt has come again so often. */
  async function type(keys: readonly string[]) {
    Object.defineProperty(process.stdout, "isTTY", { value: true, configurable: true });
    const input = Object.assign(new PassThrough(), { isTTY: true });
    let shown = "";
    let prompts = 0;
    const waiting = [...keys];
    vi.spyOn(process.stdout, "write").mockImplementation((text) => {
      shown += String(text);
      if (/^(> | {2})/.test(String(text))) prompts++;
      return true;
    });
    let [out, error] = ["", ""];
    const streams = {
      out: (text: string) => {
        out += text;
      },
      error: (text: string) => {
        error += text;
      },
    };
    const ended = main(["chat", small, "--backend", "cpu", "--max-new", "5", "--json"], { streams, input });
    let over = false;
    void ended.finally(() => {
      over = true;
    });
    for (let seen = 0; !over && waiting.length > 0; ) {
      while (!over && prompts === seen) await new Promise((done) => setTimeout(done, 5));
      await new Promise((done) => setTimeout(done, 20));
      seen = prompts; // a key may draw it at once
      input.write(waiting.shift());
    }
    return { code: await ended, answers: out.trim().split("\n"), error, shown };
  }
  const [paste, end] = ["\u001B[200~", "\u001B[201~"];

  const messages = (file: string): unknown => JSON.parse(readFileSync(file, "utf8")).messages;

  test("lines that are pasted together are one message", async () => {
    const file = join(root, "pasted.json");
    const text = "My\\\rYale\r\rwas";
    const keys = [`${paste}${text}${end}`, "!\r", `/save ${file}\r`, "\u0004"];
    const { code, answers, shown } = await type(keys);
    expect([code, answers.length]).toEqual([0, 1]);
    const { content } = JSON.parse(answers[0] ?? "");
    expect(messages(file)).toEqual([user("My\\\nYale\n\nwas!"), assistant(content)]);
    expect(shown).toContain("\u001B[?2004h");
    expect(shown.endsWith("\u001B[?2004l")).toBe(true);
  });

  test("the end of input while an answer is made", async () => {
    const { code, answers, error } = await type(["was\r\u0004"]);
    expect([code, answers.length, error]).toEqual([0, 1, expect.not.stringContaining("closed")]);
  });

  test("Ctrl-C takes back what was written", async () => {
    const file = join(root, "taken-back.json");
    const keys = [`${paste}My\rYa${end}`, "\u0003", "was\r", `/save ${file}\r`, "\u0004"];
    const { code, error } = await type(keys);
    expect(code).toBe(0);
    expect(error).toContain("Ctrl-C again leaves");
    expect(messages(file)).toMatchObject([user("was"), { role: "assistant" }]);
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
