#!/bin/bash
# compiler.sh: collect in the current folder a C compiler, and nothing of it that C does not need. Run by the Dockerfile.
# triton compiles a small launcher for each new kernel signature.
set -eu
ARCH=$(uname -m)-linux-gnu
WANTED="^/usr/(bin/($ARCH-)?(gcc|gcc-[0-9]+|as|ld|ld.bfd)\$|include/|lib(exec)?/gcc/"
WANTED+="|lib/$ARCH/(crt[1in]\.o|libc\.so|libc_nonshared\.a|libm\.so|libmvec\.so))"
UNWANTED='/(lto1|lib[a-z]*san[^/]*|lib(gcov|gomp|itm|quadmath|atomic)[^/]*|plugin)(/|$)'
UNWANTED+='|/include/(drm|rdma|scsi|sound|video|xen|misc|mtd|c\+\+)/|/include/linux/(netfilter|media|usb|can|dvb|hdlc|iio|tc_)'
dpkg -L $(dpkg-query -W -f '${Package}\n' | grep -E '^(gcc|cpp|binutils|libgcc-[0-9]+-dev|libc6-dev|linux-libc-dev)') |
  grep -E "$WANTED" | grep -vE "$UNWANTED" |
  while read -r file; do [ -d "$file" ] && [ ! -L "$file" ] || cp --parents -P "$file" .; done
mkdir -p "usr/lib/$ARCH" usr/local/include
cp -r /usr/local/include/python3.12 usr/local/include/
gcc=$(ls -d usr/lib/gcc usr/libexec/gcc 2>/dev/null || true) # the compiler proper is in either, by its version
find $gcc -type f -perm /111 -exec strip --strip-unneeded {} +
find usr/bin $gcc -type f -perm /111 -exec ldd {} + 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | sort -u |
  while read -r library; do cp -nL "$library" "usr/lib/$ARCH/"; done
rm -f "usr/lib/$ARCH/libc.so.6" "usr/lib/$ARCH/libm.so.6" # the root has them
