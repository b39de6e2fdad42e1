// Finds a browser of the Chromium family on this machine; nothing is downloaded.
import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";

/** What keeps it quiet, and what it needs in a container. */
export const flags: readonly string[] = [
  "--headless",
  "--no-sandbox",
  "--enable-unsafe-webgpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

const commands = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge"];
const places: Readonly<Record<string, readonly string[]>> = {
  darwin: [
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
  ],
  win32: ["ProgramFiles", "ProgramFiles(x86)", "LOCALAPPDATA"].flatMap((name) => {
    const folder = process.env[name];
    if (folder === undefined) return [];
    return [
      join(folder, "Google", "Chrome", "Application", "chrome.exe"),
      join(folder, "Microsoft", "Edge", "Application", "msedge.exe"),
    ];
  }),
  linux: ["/usr/bin/chromium", "/snap/bin/chromium"],
};

/**
 * Path of a browser: SWITCHYARD_CHROMIUM, or the first of the usual names and places; undefined where there is none.
 * Throws when SWITCHYARD_CHROMIUM names no file: who asks for one browser does not want the tests skipped.
 */
export function findChromium(): string | undefined {
  const asked = process.env.SWITCHYARD_CHROMIUM;
  if (asked) {
    if (!existsSync(asked)) throw new Error(`SWITCHYARD_CHROMIUM is ${asked}, but there is no such file`);
    return asked;
  }
  const suffix = process.platform === "win32" ? ".exe" : "";
  const folders = (process.env.PATH ?? "").split(delimiter).filter((folder) => folder !== "");
  return [
    ...(places[process.platform] ?? []),
    ...commands.flatMap((name) => folders.map((folder) => join(folder, `${name}${suffix}`))),
  ].find((path) => existsSync(path));
}
