// A WebGPU device for tests on machines without a GPU: the software driver inside Debian's chromium package (needs libvulkan1).
import { existsSync } from "node:fs";

const softwareDriver = "/usr/lib/chromium/vk_swiftshader_icd.json";
const choices = ["VK_ICD_FILENAMES", "VK_DRIVER_FILES", "VK_ADD_DRIVER_FILES"];

/**
 * Adds Chromium's software driver to those that Vulkan's loader finds, so that a GPU still comes first; not where the environment
 * chooses drivers. Before the first request for an adapter.
 */
export function useSoftwareDriver(): void {
  if (!existsSync(softwareDriver)) return;
  // The loader asks for a folder of the user's, and complains where there is none.
  process.env.XDG_RUNTIME_DIR ??= "/tmp";
  if (!choices.some((name) => process.env[name])) process.env.VK_ADD_DRIVER_FILES = softwareDriver;
}
