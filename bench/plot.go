package main

func (r *report) writeHTML(name string) error { return nil }
