#!/usr/bin/env node
// Stands outside dist so that npm links the program in a clone too, where nothing is built yet.
import "../dist/bin.js";
