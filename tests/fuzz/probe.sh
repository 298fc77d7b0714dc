#!/bin/sh
# Whether ${FUZZ_CC:-clang} is there and has libFuzzer and AddressSanitizer (Debian's libclang-rt-dev).
echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
  "${FUZZ_CC:-clang}" -fsanitize=fuzzer,address -x c - -o /dev/null 2>/dev/null
