// Chat templates against what Transformers made of the same ones; where a checkpoint keeps them; what goes wrong, in words; templates
// that never end.
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CheckpointError, type Json, ShapeError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import {
  type ChatMessage,
  type ChatOptions,
  chatTemplate,
  namedChatTemplates,
  readChatTemplate,
} from "./chat-template.ts";
import { readCheckpoint } from "./checkpoint.ts";
import { bytesSource } from "./safetensors.ts";
import { tokenizer } from "./tokenizer.ts";
import { trainTokenizer } from "./tokenizer-training.ts";

interface Case extends Pick<ChatOptions, "addGenerationPrompt" | "tools" | "documents" | "variables"> {
  readonly name: string;
  readonly template: string;
  readonly messages: ChatMessage[];
  readonly special?: { readonly [key: string]: Json };
  readonly text?: string;
  readonly error?: string;
}
const url = new URL("../test/fixtures/chat-templates.json", import.meta.url);
const { cases } = JSON.parse(await readFile(url, "utf8")) as { readonly cases: readonly Case[] };

const messages: ChatMessage[] = [{ role: "user", content: "Hi" }];
const render = (template: Json, options: ChatOptions = {}, given = messages): string =>
  chatTemplate({ config: { chat_template: template } }).render(given, options);

/** A checkpoint of these files and no tensor. */
function checkpoint(files: Readonly<Record<string, string | Uint8Array>>) {
  const weights = new Uint8Array([2, 0, 0, 0, 0, 0, 0, 0, 0x7b, 0x7d]); // the length of the header, and {}
  const all = new Map(Object.entries({ "config.json": "{}", "model.safetensors": weights, ...files }));
  return readCheckpoint(async (name) => {
    const content = all.get(name);
    if (content === undefined) return undefined;
    return bytesSource(name, typeof content === "string" ? new TextEncoder().encode(content) : content);
  }, "here");
}

describe("gives what Transformers gives:", () => {
  // As recorded: 26 July 2024, 9:05.
  const date = new Date(2024, 6, 26, 9, 5, 3);
  it.each(cases)("$name", ({ template, special = {}, messages: given, text, error, ...options }) => {
    const one = chatTemplate({ config: { ...special, chat_template: template } });
    if (text !== undefined) expect(one.render(given, { ...options, date })).toBe(text);
    else {
      expect(() => one.render(given, { ...options, date })).toThrow(ShapeError);
      expect(() => one.render(given, { ...options, date })).toThrow(`the template refuses these messages: ${error}`);
    }
  });

  it("and the cases are texts and refusals", () => {
    expect(cases.filter(({ text }) => text !== undefined).length).toBeGreaterThan(5);
    expect(cases.filter(({ error }) => error !== undefined).length).toBeGreaterThan(1);
  });
});

describe("the templates of a checkpoint", () => {
  it("are encoded without a second first token", async () => {
    const files = await trainTokenizer(["Hi there"], { vocabulary: 280, specialTokens: ["<s>", "</s>"] });
    const config = { ...files.config, bos_token: "<s>", eos_token: { content: "</s>" }, add_bos_token: true };
    const template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
    const text = chatTemplate({ config: { ...config, chat_template: template } }).render(messages);
    expect(text).toBe("<s>Hi</s>");
    const ours = tokenizer({ ...files, config });
    expect([...ours.encode(text)]).toEqual([0, ...ours.encode("Hi"), 1]);
  });

  it("may have names: the one for tools where there are tools, else the default, or the one asked for", () => {
    const list = [
      { name: "default", template: "plain" },
      { name: "tool_use", template: "tools" },
      { name: "rag", template: "documents" },
    ];
    const chat = chatTemplate({ config: { chat_template: list } });
    expect(chat.names).toEqual(["default", "tool_use", "rag"]);
    expect(chat.render(messages)).toBe("plain");
    expect(chat.render(messages, { tools: [{}] })).toBe("tools");
    expect(chat.render(messages, { tools: [{}], template: "rag" })).toBe("documents");
    expect(() => chat.render(messages, { template: "other" })).toThrow(
      /no template "other"; this checkpoint has "default", "tool_use", "rag"/,
    );
    const one = chatTemplate({ config: { chat_template: [{ name: "rag", template: "x" }] } });
    expect(() => one.render(messages)).toThrow(/no template "default"; this checkpoint has "rag"/);
  });

  it("lie in chat_template.jinja, tokenizer_config.json or chat_template.json, in this order", async () => {
    const config = JSON.stringify({ chat_template: "config" });
    const files = { "chat_template.jinja": "file {{ bos_token }}", "chat_template.json": '{"chat_template":"json"}' };
    const special = { "special_tokens_map.json": '{"bos_token":{"content":"<b>"}}' };
    const read = async (some: Readonly<Record<string, string>>): Promise<string> =>
      (await readChatTemplate(await checkpoint(some))).render(messages);
    expect(await read({ ...files, ...special, "tokenizer_config.json": config })).toBe("file <b>");
    expect(await read({ ...files, "tokenizer_config.json": '{"bos_token":"<s>"}' })).toBe("file <s>");
    expect(await read({ "chat_template.json": files["chat_template.json"], "tokenizer_config.json": config })).toBe(
      "config",
    );
    expect(await read({ "chat_template.json": files["chat_template.json"] })).toBe("json");
  });

  it("may have names in a folder of their own, as Transformers saves them", async () => {
    const folder = await mkdtemp(join(tmpdir(), "switchyard-templates-"));
    try {
      const here = join(folder, "model");
      const own = join(here, "additional_chat_templates");
      await mkdir(own, { recursive: true });
      expect(await namedChatTemplates(join(folder, "nowhere"))).toEqual({});
      expect(await namedChatTemplates(here)).toEqual({});
      await writeFile(join(own, "tool_use.jinja"), "tools {{ tools | length }}");
      await writeFile(join(own, "rag.jinja"), "documents");
      await writeFile(join(own, "notes.txt"), "no template");
      const named = await namedChatTemplates(here);
      const beside = await checkpoint({
        "chat_template.jinja": "plain",
        "chat_template.json": '{"chat_template":"json"}',
      });
      const chat = await readChatTemplate(beside, named);
      expect(chat.names).toEqual(["default", "rag", "tool_use"]);
      expect(chat.render(messages)).toBe("plain");
      expect(chat.render(messages, { tools: [{}] })).toBe("tools 1");
      expect(chat.render(messages, { template: "rag" })).toBe("documents");
      // Such files replace what the JSON files say.
      const alone = await readChatTemplate(
        await checkpoint({ "chat_template.json": '{"chat_template":"json"}' }),
        named,
      );
      expect(alone.names).toEqual(["rag", "tool_use"]);
      // Links lead where those of the weights may lead.
      await writeFile(join(folder, "elsewhere"), "stolen");
      await symlink(join("..", "..", "elsewhere"), join(own, "link.jinja"));
      await expect(namedChatTemplates(here)).rejects.toThrow(/link.jinja: it is a link that leads out of the folder/);
      expect((await namedChatTemplates(here, { followLinks: true })).link).toBe("stolen");
      await rm(join(own, "link.jinja"));
      await writeFile(join(own, "bytes.jinja"), Uint8Array.of(0xff));
      await expect(namedChatTemplates(here)).rejects.toThrow(/bytes.jinja is not a text: it is not UTF-8/);
      await writeFile(join(own, "bytes.jinja"), "x".repeat(600_000));
      await expect(namedChatTemplates(here)).rejects.toThrow(
        /bytes.jinja has 600000 bytes; at most 524288 are allowed/,
      );
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it("are found through the links of the Hub's cache, but not through a link of the whole folder elsewhere", async () => {
    const folder = await mkdtemp(join(tmpdir(), "switchyard-templates-"));
    try {
      const snapshot = join(folder, "models--a--b", "snapshots", "abc");
      const own = join(snapshot, "additional_chat_templates");
      await mkdir(own, { recursive: true });
      await mkdir(join(folder, "models--a--b", "blobs"));
      await writeFile(join(folder, "models--a--b", "blobs", "123"), "from the Hub");
      await symlink(join("..", "..", "..", "blobs", "123"), join(own, "rag.jinja"));
      expect(await namedChatTemplates(snapshot)).toEqual({ rag: "from the Hub" });
      const other = join(folder, "other");
      await mkdir(other);
      await symlink(own, join(other, "additional_chat_templates"));
      await expect(namedChatTemplates(other)).rejects.toThrow(
        /is a link that leads out of .*other, to .*followLinks: true/,
      );
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it("may be missing: that is no error until one is needed", async () => {
    const chat = await readChatTemplate(await checkpoint({}));
    expect(chat.names).toEqual([]);
    expect(() => chat.render(messages)).toThrow(CheckpointError);
    expect(() => chat.render(messages)).toThrow(/this checkpoint has no chat template: neither chat_template.jinja/);
  });

  it("may be no text at all", async () => {
    const broken = await checkpoint({ "chat_template.jinja": new Uint8Array([0xff]) });
    await expect(readChatTemplate(broken)).rejects.toThrow(/chat_template.jinja is not a text: it is not UTF-8/);
  });
});

describe("render", () => {
  it("refuses what are no messages", () => {
    expect(() => render("x", {}, [])).toThrow(/there are no messages; at least one is needed/);
    const odd = [{ role: "user" }, { content: "Hi" }] as unknown as ChatMessage[];
    expect(() => render("x", {}, odd)).toThrow(/message 1 is .*content.*; expected \{ role: "user"/);
  });

  it("gives variables, which come before special tokens, and nothing of the machine", () => {
    const config = { bos_token: "<s>", chat_template: "{{ bos_token }}{{ extra }}" };
    const variables = { bos_token: "<b>", extra: [1, { a: null }] };
    expect(chatTemplate({ config }).render(messages, { variables })).toBe("<b>[1, {'a': None}]");
    for (const name of ["process", "globalThis", "constructor", "__proto__", "toString"]) {
      expect(render(`{{ ${name} is defined }}{{ messages[0].${name} is defined }}`)).toBe("FalseFalse");
    }
    expect(() => render("{{ ''.constructor.constructor('return 1')() }}")).toThrow(CheckpointError);
  });

  it("knows the dates of Python in English", () => {
    const format = "%a %A %b %B %d %m %y %Y %H %I %M %S %p %%";
    expect(render(`{{ strftime_now("${format}") }}`, { date: new Date(2024, 0, 7, 15, 4, 5) })).toBe(
      "Sun Sunday Jan January 07 01 24 2024 15 03 04 05 PM %",
    );
    expect(render(`{{ strftime_now("%Y") }}`)).toMatch(/^20\d\d$/);
    expect(() => render(`{{ strftime_now("%Q") }}`)).toThrow(
      /template "default" failed: strftime_now: %Q is not known/,
    );
  });

  it("has Python's range", () => {
    expect(render("{{ range(3) }}{{ range(1, 3) }}{{ range(5, 0, -2) }}{{ range(2, 2) }}")).toBe(
      "[0, 1, 2][1, 2][5, 3, 1][]",
    );
    expect(() => render("{{ range(1, 2, 0) }}")).toThrow(/the third not 0/);
    expect(() => render("{{ range('3') }}")).toThrow(/whole numbers/);
  });

  it.each<[string, Json, RegExp]>([
    ["no text", 3, /template "default" is 3, not a text/],
    ["no Jinja", "{% if %}", /template "default" is not valid Jinja: /],
    ["an open block", "{% for m in messages %}", /is not valid Jinja: /],
    ["an unknown filter", "{{ 'x' | nothing }}", /template "default" failed: Unknown StringValue filter: nothing/],
    ["too long", "x".repeat(200_000), /has 200000 characters; at most 131072 are allowed/],
    ["all blank", `x${" ".repeat(2000)}x`, /over 1000 white characters in a row/],
    ["nested too deeply", `{{ ${"(".repeat(60_000)}`, /is not valid Jinja: /],
  ])("refuses a template that is %s", (_, template, message) => {
    expect(() => render(template)).toThrow(CheckpointError);
    expect(() => render(template)).toThrow(message);
  });

  it.each([
    ["a long range", "{{ range(1000000000) }}", /range\(1000000000\) has over 100000 numbers/],
    [
      "loops in loops",
      "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
      /does not come to an end/,
    ],
    [
      "a text that doubles",
      "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
      /makes a text of over \d+ characters/,
    ],
    [
      "a list that doubles",
      "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
      /list or record of over 1000000 values/,
    ],
    [
      "namespaces that double",
      `${Array.from({ length: 60 }, (_, i) => `{% set n${i + 1} = namespace(a=1, b=1) %}`).join("")}${Array.from(
        { length: 59 },
        (_, i) => `{% set n${i + 2}.a = n${i + 1} %}{% set n${i + 2}.b = n${i + 1} %}`,
      ).join("")}{{ n60 }}`,
      /list or record of over 1000000 values/,
    ],
    ["a namespace in itself", "{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns }}", /failed: /],
    ["a macro that calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", /failed: /],
    ["a wide indent", "{{ messages | tojson(indent=100000000) }}", /failed: /],
  ])("stops %s in time", { timeout: 20_000 }, (_, template, message) => {
    const start = performance.now();
    // One call only: some take seconds.
    expect(() => render(template)).toThrow(
      expect.objectContaining({ name: "CheckpointError", message: expect.stringMatching(message) }),
    );
    expect(performance.now() - start).toBeLessThan(15_000);
  });

  it("has room for long conversations", () => {
    const long = Array.from({ length: 2000 }, (_, i) => ({
      role: i % 2 ? "assistant" : "user",
      content: `${"word ".repeat(500)}${i}`,
    }));
    const template =
      "{% for m in messages %}{% if loop.index0 > 0 and messages[loop.index0 - 1].role == m.role %}" +
      "{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}";
    expect(render(template, {}, long)).toBe(long.map(({ role, content }) => `<${role}>${content}`).join(""));
  });
});
