#!/bin/sh
# The report is tested in a real browser. Install one where we may; otherwise say what to install.
set -e
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing chromium and chromium-driver"
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null && exit 0
fi
echo "chromium and chromedriver are not installed: the browser tests will be skipped."
echo "install them, for example: sudo apt-get install chromium chromium-driver"
