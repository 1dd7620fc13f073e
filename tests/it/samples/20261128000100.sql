UPDATE app SET reserved_cpu = 500, reserved_memory = 134217728;
