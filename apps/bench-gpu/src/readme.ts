// Writes the figures of a run into a README, between two markers. Only a whole run on a GPU is worth keeping.
import { readFileSync, writeFileSync } from "node:fs";
import { markdownTable, type Table } from "@switchyard/bench/kernels";
import type { DeviceInfo } from "./device.ts";

export interface Report {
  readonly device: DeviceInfo;
  readonly date: string;
  readonly host: { readonly cpu: string; readonly platform: string };
  /** Of Node and of everyone who took part, by name. */
  readonly versions: Readonly<Record<string, string>>;
  readonly clock: string;
  readonly tables: readonly Table[];
}

export const opening = "<!-- bench:gpu -->";
export const closing = "<!-- end of bench:gpu -->";

/** What stands between the markers. */
export function section({ device, date, host, versions, clock, tables }: Report): string {
  const known = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
  const limits = Object.entries(device.limits).map(([name, value]) => `${name} ${value}`);
  const maker = [device.vendor, device.architecture].filter((word) => word).join(" ");
  return [
    `**${device.name}**${maker ? ` (${maker})` : ""}, ${date.slice(0, 10)}, ${host.platform}, ${host.cpu}; ${known.join(", ")}.`,
    `Limits: ${limits.join(", ")}. Features: ${device.features.join(", ") || "none"}. ${clock}`,
    "",
    markdownTable(tables),
  ].join("\n");
}

/** The README with the section written anew. @throws Error when the markers are missing. */
export function filled(readme: string, text: string): string {
  const start = readme.indexOf(opening);
  const end = readme.indexOf(closing);
  if (start < 0 || end < start) throw new Error(`the README has no ${opening} followed by ${closing}`);
  return `${readme.slice(0, start + opening.length)}\n${text}\n${readme.slice(end)}`;
}

/** Why a run is not kept; undefined when it is. */
export function reasonToLeave(run: { readonly software: boolean; readonly whole: boolean }): string | undefined {
  if (run.software) return "this driver computes on the processor: its figures say nothing about GPUs";
  if (!run.whole) return "only a run without --quick, --case and --peer is complete";
  return undefined;
}

/** @throws Error when the file or its markers are missing. */
export function writeReadme(path: string, report: Report): void {
  writeFileSync(path, filled(readFileSync(path, "utf8"), section(report)));
}
