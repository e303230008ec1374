module virtfs-proxy-helper

go 1.26
