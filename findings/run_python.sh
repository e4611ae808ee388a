# Sourced by each finding: run_python PACKAGE==VERSION ... < SCRIPT runs a script in a virtual
# environment of its own, with nothing but these packages, and removes it.
run_python() {
  local folder
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' RETURN
  python3.11 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install -q "$@"
  (cd "$folder" && "$folder/venv/bin/python" -W ignore -)
}
