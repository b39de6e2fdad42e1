// Files that are whole or absent; snapshots that come back exactly or are refused.
import { chmodSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CheckpointError } from "@switchyard/core";
import { afterAll, describe, expect, test, vi } from "vitest";
import { readText, writableFolder, writeWhole } from "./store.ts";

// A disk with a given number of bytes left that takes so many at once; Infinity is the real one.
const disk = vi.hoisted(() => ({ left: Number.POSITIVE_INFINITY, atOnce: Number.POSITIVE_INFINITY }));
vi.mock("node:fs", async (original) => {
  const fs = await original<typeof import("node:fs")>();
  const writeSync = (file: number, bytes: Uint8Array, from: number, count: number): number => {
    if (disk.left <= 0) throw Object.assign(new Error("ENOSPC: no space left on device, write"), { code: "ENOSPC" });
    const written = fs.writeSync(file, bytes, from, Math.min(count, disk.left, disk.atOnce));
    disk.left -= written;
    return written;
  };
  return { ...fs, writeSync };
});

const folder = mkdtempSync(join(tmpdir(), "switchyard-store-"));
afterAll(() => rmSync(folder, { recursive: true }));

describe("writeWhole", () => {
  test("replaces a file and leaves no other", () => {
    const inside = join(folder, "whole");
    mkdirSync(inside);
    writeWhole(join(inside, "a.txt"), ["one"]);
    writeWhole(join(inside, "a.txt"), ["t", Uint8Array.of(119, 111)]);
    expect(readFileSync(join(inside, "a.txt"), "utf8")).toBe("two");
    expect(readdirSync(inside)).toEqual(["a.txt"]);
  });

  test("a failure says what and why and leaves nothing behind", () => {
    expect(() => writeWhole(join(folder, "nowhere", "a.txt"), ["x"])).toThrow(
      new CheckpointError(`cannot write ${join(folder, "nowhere", "a.txt")}: no such file or folder`),
    );
    const inside = join(folder, "taken");
    mkdirSync(join(inside, "a.txt"), { recursive: true });
    expect(() => writeWhole(join(inside, "a.txt"), ["x"])).toThrow("it is a folder");
    expect(readdirSync(inside)).toEqual(["a.txt"]);
  });
});

describe("a full disk", () => {
  test.each([0, 1, 700])("with %i bytes left is named, the old file stays and nothing else is left", (left) => {
    const inside = mkdtempSync(join(folder, "full"));
    const path = join(inside, "a.txt");
    writeWhole(path, ["old"]);
    disk.left = left;
    try {
      expect(() => writeWhole(path, ["new".repeat(300)])).toThrow(
        new CheckpointError(`cannot write ${path}: the disk is full`),
      );
    } finally {
      disk.left = Number.POSITIVE_INFINITY;
    }
    expect(readFileSync(path, "utf8")).toBe("old");
    expect(readdirSync(inside)).toEqual(["a.txt"]);
  });

  test("writes that the system cuts short are continued", () => {
    const path = join(folder, "short.txt");
    disk.atOnce = 700;
    try {
      writeWhole(path, ["abc".repeat(1000), new Uint8Array(10).fill(65)]);
    } finally {
      disk.atOnce = Number.POSITIVE_INFINITY;
    }
    expect(readFileSync(path, "utf8")).toBe(`${"abc".repeat(1000)}AAAAAAAAAA`);
  });
});

describe("writableFolder", () => {
  test("makes the folder and leaves it empty", () => {
    writableFolder(join(folder, "new", "deep"));
    expect(readdirSync(join(folder, "new", "deep"))).toEqual([]);
  });

  test.skipIf(process.platform !== "linux")("a file system that takes no folders is refused, not waited for", () => {
    expect(() => writableFolder("/proc/no-such/runs")).toThrow(
      new CheckpointError(
        "cannot make the folder /proc/no-such/runs: /proc takes no new folders; choose another place",
      ),
    );
  });

  test("a file in the way is named", () => {
    writeFileSync(join(folder, "file"), "x");
    expect(() => writableFolder(join(folder, "file", "below"))).toThrow("a part of the path is a file");
  });

  test.skipIf(process.getuid?.() === 0 || process.platform === "win32")(
    "a read-only folder is refused (not as root)",
    () => {
      const locked = join(folder, "locked");
      mkdirSync(locked);
      chmodSync(locked, 0o500);
      expect(() => writableFolder(locked)).toThrow("permission denied");
    },
  );
});

test("reading what is not there names the file", () => {
  expect(() => readText(join(folder, "none.json"))).toThrow(
    `cannot read ${join(folder, "none.json")}: no such file or folder`,
  );
});
