#!/bin/sh
# Runs a compiler and keeps what it says beside the object it makes: the log of the assembler is part of the build.
object=
previous=
for word in "$@"; do
  [ "$previous" = -o ] && object=$word
  previous=$word
done
"$@" 2>"$object.log"
code=$?
# The assembler's usual report is for the log alone; warnings and errors are for everybody.
grep -vE "^ptxas info|bytes stack frame|^ *$" "$object.log" >&2
exit $code
