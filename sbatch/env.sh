# Sourced by demo.sh and tests/run.sh from the repository root: checks the system, makes .venv,
# installs. The Slurm scripts use what it made.
packages="python3-venv libegl1 libegl-mesa0 libgl1-mesa-dri"
libraries=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p)
if ! grep -q 'libEGL\.so\.1' <<<"$libraries" \
   || ! grep -qE 'libEGL_(mesa|nvidia)\.so\.0' <<<"$libraries" \
   || ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
  echo "missing system packages; run: apt-get install -y $packages" >&2
  exit 1
fi
if ! python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
  version=$(python3 -V 2>&1 | cut -d' ' -f2)
  echo "python3 is $version; nanoLAPA's pinned packages need 3.11 or 3.12" >&2
  exit 1
fi
[ -x .venv/bin/python ] || python3 -m venv .venv
if ! cmp -s requirements.txt .venv/installed.txt; then
  echo "installing requirements.txt into .venv (minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed.txt
fi
source .venv/bin/activate
