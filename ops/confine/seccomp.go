package confine

import "os"

type Seccomp string

func (c Config) filterServer() (*os.File, error) { return nil, nil }
