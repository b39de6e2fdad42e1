// The device of the tests: whatever there is, a software driver included.
import { type Found, findDevice } from "./device.ts";

/** The device, or undefined after one printed line. SWITCHYARD_REQUIRE_GPU=1 makes its absence an error. */
export async function findTestDevice(): Promise<Found | undefined> {
  try {
    return await findDevice(() => undefined);
  } catch (error) {
    if (process.env.SWITCHYARD_REQUIRE_GPU === "1") throw error;
    console.warn(`GPU benchmark tests skipped: ${(error as Error).message}`);
    return undefined;
  }
}
