#!/bin/sh
# Usage: check_weak_symbols.sh NM OBJECT...
# A weak function of an AVX-512 object can be the copy that the linker keeps for every caller, and
# then crashes older CPUs. W, V: weak; u: unique across the process.
nm=$1
shift
if [ $# -eq 0 ]; then
  echo "$0: no objects given" >&2
  exit 2
fi
status=0
for object in "$@"; do
  symbols=$("$nm" -C "$object") || exit 2
  weak=$(printf '%s\n' "$symbols" | grep -E '^[0-9a-fA-F ]* [WVu] ')
  if [ -n "$weak" ]; then
    printf 'weak symbols in %s (use static or an unnamed namespace):\n%s\n' "$object" "$weak" >&2
    status=1
  fi
done
exit $status
