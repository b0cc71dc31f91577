{{- define "commonweight.labels" -}}
app.kubernetes.io/name: commonweight
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
