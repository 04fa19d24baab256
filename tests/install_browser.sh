#!/usr/bin/env bash
# The browser test drives Debian's Chromium; install it where it is missing and we may.
set -eu
if command -v chromium >/dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing chromium for the browser test"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null
else
  echo "chromium is not installed: the browser test will fail; install it with: sudo apt-get install chromium" >&2
fi
