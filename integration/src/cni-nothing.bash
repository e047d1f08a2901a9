#!/bin/bash
# A network plugin for pods that need a network namespace of their own and nothing in it: it makes no interface, and says that there
# is one with an address, without which containerd doesn't start a pod.
cat >/dev/null
case "$CNI_COMMAND" in
VERSION) echo '{"cniVersion":"0.4.0","supportedVersions":["0.3.1","0.4.0"]}' ;;
ADD)
    printf '{"cniVersion":"0.4.0","interfaces":[{"name":"%s","sandbox":"%s"}],' "$CNI_IFNAME" "$CNI_NETNS"
    echo '"ips":[{"version":"4","interface":0,"address":"192.0.2.1/32"}]}'
    ;;
esac
