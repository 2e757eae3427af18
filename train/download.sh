# What train/download_*.sh share: files that arrive whole or stay NAME.part, from which the next run goes on.
# Sourced by bash, not run.
# shellcheck shell=bash

readonly RETRIES=${DOWNLOAD_RETRIES:-5} # attempts in a row that may bring nothing new, after 1, 2, 4, ... s

fail() {
  echo "error: $*" >&2
  exit 1
}

need_curl() {
  command -v curl >/dev/null || fail "curl is not installed; install it (Debian, Ubuntu: apt-get install curl)"
}

# Bytes of FILE; 0 where there is none.
size_of() {
  if [[ -e $1 ]]; then wc -c <"$1"; else echo 0; fi
}

# What the server says the file at URL holds, behind all redirects.
remote_size() {
  local headers size
  headers=$(curl --silent --show-error --fail --location --head --retry "$RETRIES" "$1") ||
    fail "$1: the server does not give it; check the address and the network (behind a proxy: https_proxy)"
  size=$(tr -d '\r' <<<"$headers" |
    awk 'tolower($1) ~ /^http\// { size = "" } tolower($1) == "content-length:" { size = $2 } END { print size }')
  [[ $size =~ ^[1-9][0-9]*$ ]] || fail "$1: the server names no Content-Length, takes one to check the file by; use another mirror"
  echo "$size"
}

# check_room FILE BYTES: that many more fit beside FILE.
check_room() {
  local free
  free=$(($(df -Pk "$(dirname "$1")" | awk 'NR == 2 { print $4 }') * 1024))
  ((free >= $2)) || fail "$1: takes $2 more bytes, got $free free on the disk; free space or name another folder, and run again"
}

# download URL FILE: nothing to do where FILE is complete; else goes on from FILE.part.
download() {
  local url=$1 file=$2 part=$2.part expected got
  expected=$(remote_size "$url")
  got=$(size_of "$file")
  if [[ -e $file ]]; then
    ((got == expected)) || fail "$file: got $got bytes, expected $expected as on the server; move it away and run again"
    echo "$file: complete ($expected bytes)"
    return
  fi
  mkdir -p "$(dirname "$file")"
  got=$(size_of "$part")
  check_room "$file" $((expected - got))
  echo "$file: $expected bytes, $got of them here"
  fetch "$url" "$part" "$expected"
  got=$(size_of "$part")
  ((got == expected)) || fail "$file: got $got bytes, expected $expected; what came is in $part: run again to go on, or remove it to start anew"
  mv "$part" "$file"
}

# fetch URL PART EXPECTED: attempts until PART is that long, or RETRIES in a row were for nothing.
# Not curl's own --retry: it throws away what an attempt has brought.
fetch() {
  local url=$1 part=$2 expected=$3 most status fruitless=0
  most=$(size_of "$part")
  while (($(size_of "$part") < expected)); do
    status=0
    curl --fail --location --progress-bar --speed-limit 1 --speed-time 60 --continue-at - --output "$part" "$url" || status=$?
    if ((status == 33)); then # no ranges here: from the start
      echo "$part: the server can not go on from the middle; starting anew" >&2
      rm "$part"
    fi
    if (($(size_of "$part") > most)); then
      most=$(size_of "$part") fruitless=0
    elif ((fruitless++ < RETRIES)); then
      sleep $((2 ** (fruitless - 1)))
    else
      return 0 # download says what is missing
    fi
  done
}
