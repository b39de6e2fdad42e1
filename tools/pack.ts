// Packs packages into tarballs exactly as they would be published.
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { npmProgram } from "./child.mjs";

export interface Packed {
  readonly name: string;
  readonly version: string;
  /** Absolute path of the .tgz. */
  readonly tarball: string;
  readonly bytes: number;
  readonly files: number;
}

interface PackReport {
  readonly name: string;
  readonly version: string;
  readonly filename: string;
  readonly size: number;
  readonly files: readonly unknown[];
}

/** Packs the package in `folder` into `target`. Its `dist` must be built. */
export function pack(folder: string, target: string): Packed {
  const printed = npm(["pack", folder, "--json", "--ignore-scripts", "--pack-destination", target], target);
  // npm 10 and 11 print a list, npm 12 prints an object with one entry per package.
  const [report] = Object.values(JSON.parse(printed) as Record<string, PackReport>);
  if (!report) throw new Error(`npm pack ${folder} reported nothing`);
  return {
    name: report.name,
    version: report.version,
    tarball: join(target, report.filename.replace("@", "").replace("/", "-")),
    bytes: report.size,
    files: report.files.length,
  };
}

/** Runs npm in `folder` without a shell and answers what it printed; throws with npm's own words when it fails. */
export function npm(args: readonly string[], folder: string): string {
  // An npm that runs a script tells it about this repository; a nested npm must not take it for its own.
  const environment = Object.fromEntries(
    Object.entries(process.env).filter(([name]) => !/^npm_(config_local_prefix|package_|lifecycle_)/.test(name)),
  );
  const { status, stdout, stderr, error } = spawnSync(process.execPath, [npmProgram(), ...args], {
    cwd: folder,
    env: environment,
    encoding: "utf8",
    maxBuffer: 2 ** 28,
  });
  if (error) throw error;
  if (status !== 0) throw new Error(`npm ${args.join(" ")} failed in ${folder}:\n${stdout}\n${stderr}`);
  return stdout;
}
