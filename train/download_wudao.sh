#!/usr/bin/env bash
# WuDaoCorpora 2.0's open part (Yuan et al., 2021), 200 GB of Chinese web pages: FOLDER/text, unpacked from one RAR
# archive. Run again, it goes on where it stopped.
#
#   train/download_wudao.sh [FOLDER]                 FOLDER: default runs/wudao
#
# WUDAO_URL: where the archive is; default Science Data Bank (scidb.cn), data set c6a3fe684227415a9db8e21bac4a15ab.
# The archive stays beside FOLDER/text; remove it for room.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/download.sh"

readonly NAME=WuDaoCorporaText-2.0-open.rar
readonly URL=${WUDAO_URL:-"https://download.scidb.cn/download?fileId=63a30383fed6a8a9e8454302&dataSetType=organization&fileName=$NAME"}

# unpack ARCHIVE FOLDER
unpack() {
  case ${unpacker##*/} in
    unrar) unrar x -y -idq "$1" "$2/" ;;
    7z) 7z x -y "-o$2" "$1" ;;
    bsdtar) bsdtar -xf "$1" -C "$2" ;;
  esac
}

(($# <= 1)) || fail "got $# arguments, takes [FOLDER]"
folder=${1:-runs/wudao}
if [[ -d $folder/text ]]; then
  echo "$folder/text: complete"
  exit
fi
need_curl
# before the long download, not after it
unpacker=$(command -v unrar || command -v 7z || command -v bsdtar) ||
  fail "no program that unpacks RAR is installed; install unrar, 7z (p7zip-full and p7zip-rar) or bsdtar (libarchive-tools)"
download "$URL" "$folder/$NAME"
rm -rf "$folder/text.part" # of a run that was stopped
mkdir "$folder/text.part"
echo "$folder/$NAME: unpacking with ${unpacker##*/}"
unpack "$folder/$NAME" "$folder/text.part" ||
  fail "$folder/$NAME: ${unpacker##*/} could not unpack it (see above; 200 GB take room); try another of unrar, 7z, bsdtar"
mv "$folder/text.part" "$folder/text"
